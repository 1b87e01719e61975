"""Lightning attention for TPUs: Pallas kernels in Mosaic, forward and backward."""
