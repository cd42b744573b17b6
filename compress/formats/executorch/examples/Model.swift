// The bundle's model through ExecuTorch, written from manifest.json. Not compiled where it was written.
// Swift package: https://github.com/pytorch/executorch, branch swiftpm-{{version}}, which the self-test passed with; products
// executorch, backend_xnnpack, kernels_optimized and kernels_quantized, linked with -all_load. iOS 17 or later. Add the bundle's
// folder to the app as a folder reference.
import ExecuTorch
import Foundation

final class Model {
    static let inputs = [{{inputs}}]
    static let outputs = [{{outputs}}]

    private let module: Module

    /// `bundle` is the folder that holds manifest.json.
    init(bundle: URL) throws {
        module = Module(filePath: bundle.appendingPathComponent("{{model}}").path)
        try module.load("forward")
    }

    /// One output for one row of token ids; inputs have no names there but an order.
    func run(_ ids: [String: [Int]], output: String) throws -> [Float] {
        try run(Self.inputs.map { ids[$0]! }.map { Tensor<Int>($0, shape: [1, $0.count]) }, output)
    }

    /// One output for one row of floats.
    func run(_ input: String, _ values: [Float], shape: [Int], output: String) throws -> [Float] {
        try run([Tensor<Float>(values, shape: shape)], output)
    }

    private func run(_ feed: [ValueConvertible], _ output: String) throws -> [Float] {
        let found: [Value] = try module.forward(feed)
        let tensor: Tensor<Float>? = found[Self.outputs.firstIndex(of: output)!].tensor()
        return tensor!.scalars()
    }
}
