r"""Weight quantizers: pure functions with straight-through gradients.

Every quantizer is a function of the weight and, if it has one, of a state: a learned scale, or a range that was
chosen at the start. States and scales are matrices, ``granularity.scale_shape(weight.shape)``; all arithmetic is
float32 whatever the weight's dtype and the autocast. With n = 2^(b-1) - 1, m the mean of the magnitudes \|w\|, and
Q(u) = round(n·clip(u, ±1)) / n:

=================== ========================= ============================================ ===================== =======
quantizer           paper                     formula                                      state: its start      bits
=================== ========================= ============================================ ===================== =======
``dynamic_scaling`` Tao et al. 2022           α Q(w/α), α = γ·m; all weights move γ        γ learned: 1          2 to 8
                    (QuantGPT), section 4.2
``pact``            Choi et al. 2018,         α Q(w/α); only clipped weights move α        α learned: max \|w\|  2 to 8
                    section 3
``lsq``             Esser et al. 2020,        s·round(clip(w/s, -n - 1, n))                s learned: 2m/√n      2 to 8
                    eq. 1-3
``elastic``         Liu et al. 2025           α times ±2/3, 0 (ternary); ±1/4, ±3/4 (2     α learned: max \|w\|, 1 to 4
                    (ParetoQ)                 bits); ±1 (1 bit); 3, 4 bits: ``lsq``        at 1 bit m
``laq``             Hou & Kwok 2018,          α b, with α and b in turn minimizing         none                  1 to 8
                    section 3                 Σ d (w - αb)²
``twn``             Li et al. 2016,           ±(mean of the \|w\| > 0.7 m), or 0           none                  ternary
                    section 2
``tbt``             Liu et al. 2023           α Q(w/α), α = 4/3·m                          none                  ternary
``binary``          Rastegari et al. 2016,    m·sign(w)                                    none                  1
                    section 3.1
``symmetric``       Zafrir et al. 2019        α Q(w/α), α = max \|w\| now (``minmax``),   none, or α fixed:     2 to 8
                                              or given                                     ``percentile_clip``,
                                                                                           ``mse_clip``
``asymmetric``      Jacob et al. 2018,        s·(clip(round(w/s) + z, 0, 2^b - 1) - z)     none, or a range      2 to 8
                    eq. 1                                                                  fixed: ``…_limits``
=================== ========================= ============================================ ===================== =======

*2 to 8* is 2, 3, 4, 8 and ternary, which for the grids around 0 is the same as 2. Every quantizer supports every
granularity: :class:`PerTensor`, :class:`PerRow`, :class:`PerGroup`. The papers' own: QuantGPT one γ for each matrix and
for each row of the embedding; PACT, LSQ, LAQ, TWN the tensor; TBT, ParetoQ, binary the row.

**Packing is bit-exact.** The result holds ``values`` and their codes, scales and zero points;
:func:`lmcompress.numerics.packing.dequantize` returns exactly the same values.

**NaN and infinite weights** pass into the values unchecked, since a check costs a pass over every weight in every step
and a wait for the GPU; they are an error where a state is created and where codes are requested.
"""
