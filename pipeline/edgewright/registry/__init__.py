"""Bundles in an OCI registry: pushed and pulled as artifacts, a blob for each file."""
