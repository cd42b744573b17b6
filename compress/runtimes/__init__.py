"""What a runtime and its sessions are."""
