"""Shared by the measurements of quality and speed: facts about the machine, and other packages' quantizers."""
