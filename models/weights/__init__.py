"""Reads a checkpoint's weights and puts each one where it computes.

In the order in which to read them:

    formats/                 headers of the files, and weights stored in 8 or 4 bits; no torch
    config_files             the small files: types, sizes and links; no torch
    meta_model               the model without weights, compared with those headers
    device_choice            the device and the dtype to compute in
    device_map               which device each part of the model is on
    quantization             the methods of --quantize
    loader                   opens and loads a checkpoint; `load` is the way in
    tensor_loader            loads coded weights and ranks' shares, tensor by tensor
    progress                 the progress bar
    random_weights           weights of any size without a file, for measurements
"""
