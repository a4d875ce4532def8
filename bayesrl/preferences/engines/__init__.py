"""Ways to a posterior of scores: Laplace, quadrature, a full-rank normal guide."""
