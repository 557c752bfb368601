"""The block walk: carry calibration text through the model, pruning one block after the other."""
