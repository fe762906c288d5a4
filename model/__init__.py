"""The Zamba and Zamba2 models: configuration, layers, parallel layout, kernels, conversion."""
