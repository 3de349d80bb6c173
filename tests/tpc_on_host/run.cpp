// Does what a graph compiler and the cores do with one kernel: instantiates it through its glue code, cuts its
// index space into pieces, and runs each.  Compiled behind `kernel.c` (as `tpc_main`) and `glue.cpp`.
//
// SYMBOL, INPUTS, OUTPUTS, and CALL (the call of tpc_main with tensors t[0], t[1], …) are defined for it.

const char* problem = nullptr;
int5 space_offset, space_size;

struct Argument {
    void* data;
    int64_t rank, size[DIMS];
    int64_t is_bf16;
};

extern "C" const char* run(const char* guid, const Argument* arguments, int piece) {
    HabanaKernelParams params{};
    HabanaKernelInstantiation kernel{};
    char code[16];
    std::strcpy(params.guid.name, guid);
    params.inputTensorNr = INPUTS;
    params.outputTensorNr = OUTPUTS;
    kernel.kernel.kernelElf = code;
    kernel.kernel.elfSize = sizeof code;
    Tensor tensors[INPUTS + OUTPUTS];
    Tensor* t[INPUTS + OUTPUTS];
    for (int n = 0; n < INPUTS + OUTPUTS; ++n) {
        auto& info = n < INPUTS ? params.inputTensors[n] : params.outputTensors[n - INPUTS];
        info.geometry.dims = arguments[n].rank;
        info.geometry.dataType = arguments[n].is_bf16 ? DATA_BF16 : DATA_F32;
        tensors[n].data = arguments[n].data;
        tensors[n].written = n >= INPUTS;
        for (int d = 0; d < DIMS; ++d) {
            tensors[n].size[d] = d < arguments[n].rank ? arguments[n].size[d] : 1;
            info.geometry.maxSizes[d] = tensors[n].size[d];
        }
        t[n] = &tensors[n];
    }
    problem = nullptr;
    if (InstantiateTpcKernel(&params, &kernel) != GLUE_SUCCESS) return "the glue code refuses";
    int64_t space[DIMS], pieces = 1;
    for (int d = 0; d < DIMS; ++d) {
        space[d] = d < int(kernel.indexSpaceRank) ? kernel.indexSpaceGeometry[d] : 1;
        pieces *= (space[d] + piece - 1) / piece;
    }
    for (int64_t number = 0; number < pieces; ++number) {
        int64_t rest = number;
        for (int d = 0; d < DIMS; ++d) {
            const int64_t count = (space[d] + piece - 1) / piece;
            space_offset.at[d] = rest % count * piece;
            space_size.at[d] = std::min<int64_t>(piece, space[d] - space_offset.at[d]);
            rest /= count;
        }
        for (int n = 0; n < INPUTS + OUTPUTS; ++n) {
            auto& pattern = n < INPUTS ? kernel.inputTensorAccessPattern[n] : kernel.outputTensorAccessPattern[n - INPUTS];
            for (int d = 0; d < DIMS; ++d) {
                const DimMapping& m = pattern.mapping[d];
                const int begin = space_offset.at[m.indexSpaceDim], last = begin + space_size.at[m.indexSpaceDim] - 1;
                tensors[n].first[d] = m.a * begin + m.start_b;
                tensors[n].last[d] = m.a * last + m.end_b;
            }
        }
        CALL;
    }
    return problem;
}
