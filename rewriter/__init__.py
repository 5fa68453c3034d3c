"""The core: capture, sites, targets, graft. It knows no method, no backend and no file format."""
