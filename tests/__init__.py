"""Tests: behaviour proven on real parts."""
