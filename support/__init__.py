"""What commands, training and tools share: errors, settings, files, processes, checkpoints, CPU kernels, printing."""
