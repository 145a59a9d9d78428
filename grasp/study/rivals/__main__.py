"""`python -m grasp.study.rivals` prints the documentation's table."""

from grasp.study.rivals import listed

print(listed())
