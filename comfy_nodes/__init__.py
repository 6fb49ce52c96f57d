"""Home of the ComfyUI nodes. None yet: the diffusers backend comes first."""
