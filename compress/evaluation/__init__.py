"""Quality of artifacts, measured through the runtime that will run them."""
