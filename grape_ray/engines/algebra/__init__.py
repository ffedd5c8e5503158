"""Pure tensor functions: pairs of factors, bounds on rounding, norm estimates, patches of
convolutions.
"""
