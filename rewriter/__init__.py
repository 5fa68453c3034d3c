"""The core: from a model and a spec to an adapted model. It knows no method, no backend and no file format."""
