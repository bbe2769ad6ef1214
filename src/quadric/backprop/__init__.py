"""The Hessian diagonal h beside the gradient g, through any autograd graph."""
