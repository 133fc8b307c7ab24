"""A generator of random networks that knows by construction which of their features may change places, and oracles.

A network is a program: steps over a stream of features, each step an idiom of public code (`linear`, `images`,
`tokens`, `fixed`, `structure`), and an end (`heads`). Whatever a step builds it enters into the network's `account`:
which features lie along each axis of each parameter, and what their order must respect (`spaces`). From this follow
*counterparts*: networks of the same function with their features in another order. The compiler under test is asked
nothing; a counterpart is itself verified in float64 before it is used.

`oracles` holds what must be true of zips of such networks; `python -m fuzz` looks for networks of which it is not, and
`minimise` makes those smaller.
"""
