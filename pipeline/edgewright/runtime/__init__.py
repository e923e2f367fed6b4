"""Running models: in-process sessions, child workers, emulation. The importer of onnxruntime."""
