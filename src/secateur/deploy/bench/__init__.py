"""Speed and memory of models in the runtimes that are installed, dense and result in turn."""
