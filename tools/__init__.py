"""What a trained checkpoint is good for: answers, speed, pictures of tokens, plots of runs, ONNX; and the demo."""
