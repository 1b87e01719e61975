"""Lightning attention for Hopper GPUs: Pallas kernels in Mosaic GPU, forward and backward."""
