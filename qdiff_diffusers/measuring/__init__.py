"""What quality and speed are measured with alike: the machine, and other packages' quantizers."""
