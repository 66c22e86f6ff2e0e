"""Look up every public name, then one that does not exist, and print that error."""

import levit_flax

for name in levit_flax.__all__:
    getattr(levit_flax, name)
assert set(levit_flax.__all__) <= set(dir(levit_flax))
try:
    print(levit_flax.nothing)
except AttributeError as error:
    print(error)
