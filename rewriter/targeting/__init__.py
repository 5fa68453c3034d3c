"""From a spec's patterns to the modules and the products they mean."""
