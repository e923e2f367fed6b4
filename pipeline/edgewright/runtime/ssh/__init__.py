"""Devices over SSH: a bridge process here, an agent on the device, one link between them."""
