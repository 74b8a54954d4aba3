"""Builds the distribution `vlmserve`; everything else stands in setup.cfg."""

from setuptools import setup

setup()
