"""Pure tensor mathematics: no model, no files, no global state.

What is said here is not said again in each function. Suffixes are shapes: O outputs (rows), I
inputs (columns), N tokens. Solvers leave their arguments as they are, work in the dtype of these
(fp32 or float64), and raise SecateurError if one holds NaN or infinity.

    w_OI        weights; rows of linears that share their input may be stacked
    mask_OI     bool, True = kept
    budget      rows and zeros of each stacked linear, and their pattern
    gram_II     XᵀX / N of the inputs, in the dtype of the weights; may be singular
    damping     fraction of the Gram matrix's mean diagonal that is added to its diagonal
"""
