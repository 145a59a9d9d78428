"""`python -m grasp.study.rivals` prints README's table."""

from grasp.study.rivals import listed

print(listed())
