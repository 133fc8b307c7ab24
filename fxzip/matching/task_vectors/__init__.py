"""Methods that merge parameters themselves, for networks fine-tuned from one base: features are taken as they stand.

θ_k are the parameters of network k, θ_0 those of the base, and τ_k = θ_k - θ_0 is a *task vector*. A method makes one τ
of all of them, and θ* = θ_0 + τ.
"""
