"""An ONNX graph, as ONNX Runtime GenAI's model builder writes it, to Relax."""
