"""Statistics of a model on calibration data: inputs of its modules block by block, second moments, gradients."""
