"""Operators of expressions as TPC-C on vectors of 64 float32 values; `{0}` and `{1}` are the operands' names."""

UNARY = {
    "abs": "v_f32_abs_b({0})",
    "exp": "v_exp_f32({0})",
    "negative": "-{0}",
    "relu": "v_f32_max_b({0}, (float64)0.0f)",
    "rsqrt": "v_rsqrt_f32({0})",
    "sigmoid": "v_reciprocal_f32((float64)1.0f + v_exp_f32(-{0}))",
    "silu": "{0} * v_reciprocal_f32((float64)1.0f + v_exp_f32(-{0}))",
    "sqrt": "v_sqrt_f32({0})",
    "square": "{0} * {0}",
    "tanh": "v_tanh_f32({0})",
    # Hendrycks & Gimpel 2016; the constant is sqrt(2 / pi)
    "gelu_tanh": "{0} * (float64)0.5f * ((float64)1.0f + v_tanh_f32((float64)0.7978845608f * "
    "({0} + (float64)0.044715f * {0} * {0} * {0})))",
}
BINARY = {
    "add": "{0} + {1}",
    "divide": "v_div_f32({0}, {1})",
    "maximum": "v_f32_max_b({0}, {1})",
    "minimum": "v_f32_min_b({0}, {1})",
    "multiply": "{0} * {1}",
    "subtract": "{0} - {1}",
}
