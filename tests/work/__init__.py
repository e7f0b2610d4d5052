"""Tests of counted work."""
