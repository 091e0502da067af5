"""A page to chat in the browser; the only place for NiceGUI."""
