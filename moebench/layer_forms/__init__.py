"""Layer forms: mixtures of experts that are no router over a bank of FFNs, one module each. Needs torch.

Every module has the same four functions, and its maths and shapes in its docstring:

make_weights(layer, generator, dtype, device) -> {name: Tensor}     normal, scaled by 1/sqrt(fan-in)
choices(layer, weights, x [T, D]) -> Tensor | None                  what the tokens chose; None: nothing is chosen
forward(layer, weights, x [T, D]) -> y [T, D]                       vectorised, differentiable, in the dtype of x
reference(layer, weights, x float64 [T, D], chosen) -> y float64    independent of forward; `chosen` settles near ties
"""
