"""The pure core: tensors in, tensors out. No paths, no logging, no global random state.

The mathematics that the code cites, by section.

Symbols. A linear weight ``W0`` is (out n × in m). LoRA's factors are ``A`` (r × m) and ``B`` (n × r), with a scaling
``s``. ``‖·‖`` is the Frobenius norm, ``‖·‖_row`` one L2 norm for each output row, ``⟨X, Y⟩`` the sum of ``X ∘ Y``.
``T`` is a weight that a result should come close to, ``k`` the rank of its update.

1. MAP (*Revisiting Weight Decomposition for Low-Rank Adaptation*, arXiv 2505.23094). A matrix is taken as one vector::

       W' = α·W0/‖W0‖ + β·Δ/‖Δ‖ = a·W0 + b·Δ,    a = α/‖W0‖,  b = β/‖Δ‖

   ``Δ`` is the update of any method, ``BA`` for LoRA; ``α`` and ``β`` are one scalar each for a matrix, ``a`` and ``b``
   are called gains. ``α = ‖W0‖, β = 0`` is the identity. A stacked tensor of E experts is E matrices.

2. LoRA is exact. ``W0 + s·BA`` is MAP with ``α = ‖W0‖``, ``β = s·‖BA‖``, and ``‖BA‖² = sum((BᵀB) ∘ (AAᵀ))`` needs no
   n × m product. ``BA = 0`` has no direction, and keeps ``β = 0``.

3. DoRA (arXiv 2402.09353), as PEFT computes it: ``T = diag(d)(W0 + s·BA)`` with ``d = m ⊘ ‖W0 + s·BA‖_row``. The norm
   of a convolution is over all dimensions but the first, that of an embedding over the vocabulary. Products of
   ``T − a·W0 = diag(d − a)·W0 + s·diag(d)·BA`` with thin matrices need one pass over ``W0``.

4. The closest MAP weight::

       minimise ‖(T − a·W0 − R)·P‖²   over the scalar a and all R of rank ≤ k

   ``P = I`` weighs all weights alike. ``P = C^½`` with ``C = E[x xᵀ] + λI``, the second moment of the layer's inputs,
   makes it the expected squared error of the outputs. For a fixed ``a``, ``R = [(T − a·W0)P]_k P⁻¹``, the truncated SVD
   (Eckart and Young 1936); what is left, ``f(a) = Σ_{i>k} σ_i²((T − a·W0)P)``, depends on one number. The singular
   vectors come from a randomized block Krylov method (Musco and Musco 2015). The certificate
   ``ε = ‖(T − W')P‖ / ‖(T − W0)P‖`` is computed afterwards, from the factors as they are stored.

5. DoRA's own direction. With ``Δ = T − W0`` kept as A, B and m, MAP is exact at ``α = ‖W0‖``, ``β = ‖Δ‖``, and
   ``W' = (a − b)·W0 + b·diag(d)(W0 + s·BA)``.

6. Inclusions: ``LoRA_k ⊂ MAP_k ⊂ DoRA_k``. With ``a = 1`` a MAP weight is a plain LoRA; with any other ``a ≠ 0`` it is
   a DoRA with the update ``(b/a)·Δ`` and the magnitude ``m = a·‖W0 + (b/a)·Δ‖_row``. The form of section 5 is a DoRA as
   well: its row i is a multiple of ``W0_i + c_i·(BA)_i``. So stock PEFT computes every MAP weight.

7. Training. With ``y = a·W0·x + b·B(Ax)`` and ``g = ∂L/∂y``, ``∂L/∂a = ⟨x, W0ᵀg⟩``, the base path's input gradient,
   which the backward pass computes in any case, and ``∂L/∂b = ⟨Ax, Bᵀg⟩``: neither needs an activation that LoRA
   does not keep.

8. Another base ``W1``. ``T`` is the weight on the base it was trained on, ``x`` the layer's inputs in the source,
   ``x̃`` those in the result. ``minimise E‖T·x − (a·W1 + R)·x̃‖²`` is a reduced-rank regression (Izenman 1975): with
   ``C = E[x̃ x̃ᵀ] + λI`` and ``M = (T·E[x x̃ᵀ] − a·W1·C)·C^−½``, ``R = [M]_k·C^−½``. For ``x̃ = x`` it is section 4.
"""
