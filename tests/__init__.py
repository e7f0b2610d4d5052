from contextlib import suppress

with suppress(TypeError):  # in a worker of Ray whose driver has nnsight: it adds to `object` what beartype cannot hash
    from . import typecheck as typecheck  # jaxtyping looks it up by this path
