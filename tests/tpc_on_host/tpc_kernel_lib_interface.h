// The part of the graph compiler's interface that generated glue code uses; see "TPC User Guide", glue code.
#pragma once
#include <cstdint>

#define _IN_
#define _OUT_
#define _INOUT_

namespace tpc_lib_api {

enum GlueCodeReturn {
    GLUE_SUCCESS,
    GLUE_NODE_NOT_FOUND,
    GLUE_INCOMPATIBLE_INPUT_COUNT,
    GLUE_INCOMPATIBLE_OUTPUT_COUNT,
    GLUE_INCOMPATIBLE_INPUT_SIZE,
    GLUE_INCOMPATIBLE_OUTPUT_SIZE,
    GLUE_INCOMPATIBLE_DATA_TYPE,
    GLUE_INSUFFICIENT_ELF_BUFFER,
};
enum DeviceId { DEVICE_ID_GAUDI, DEVICE_ID_GAUDI2, DEVICE_ID_GAUDI3 };
enum TensorDataType { DATA_F32, DATA_BF16 };

constexpr int MAX_DIMS = 5, MAX_TENSORS = 16;

struct GuidInfo {
    char name[128];
};
struct TensorGeometry {
    uint32_t dims;
    uint64_t maxSizes[MAX_DIMS];
    TensorDataType dataType;
};
struct TensorInfo {
    TensorGeometry geometry;
};
struct HabanaKernelParams {
    GuidInfo guid;
    TensorInfo inputTensors[MAX_TENSORS], outputTensors[MAX_TENSORS];
    uint32_t inputTensorNr, outputTensorNr;
};
struct DimMapping {
    uint32_t indexSpaceDim;
    float a, start_b, end_b;
};
struct TensorAccessPattern {
    DimMapping mapping[MAX_DIMS];
};
struct DeviceKernel {
    void* kernelElf;
    uint32_t elfSize, paramsNr;
};
struct HabanaKernelInstantiation {
    uint32_t indexSpaceRank;
    uint64_t indexSpaceGeometry[MAX_DIMS];
    TensorAccessPattern inputTensorAccessPattern[MAX_TENSORS], outputTensorAccessPattern[MAX_TENSORS];
    DeviceKernel kernel;
};

}
