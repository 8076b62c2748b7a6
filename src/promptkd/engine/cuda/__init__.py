"""Running a model on CUDA devices."""
