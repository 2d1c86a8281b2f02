from setuptools import find_packages as find, setup
ours = [f"robbench.{name}" for name in find(include=["defenses", "defenses.*"])]
setup(packages=[*find("benchmark"), *ours])
