"""What calibration data tell about a model: inputs of its modules block by block, second moments, gradients."""
