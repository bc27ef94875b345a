"""Sampling: the ODE of class-conditional models, and stock pipelines with shared noise."""

from davae.sample.ode import euler_ode

__all__ = ["euler_ode"]
