from . import typecheck as typecheck  # jaxtyping looks it up by this path
