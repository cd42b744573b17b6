// The bundle's model through ONNX Runtime, written from manifest.json. Not compiled where it was written.
// Swift package: microsoft/onnxruntime-swift-package-manager (the self-test passed with ONNX Runtime {{version}}). Add the
// bundle's folder to the app as a folder reference.
import Foundation
import OnnxRuntimeBindings

final class Model {
    static let inputs = [{{inputs}}]

    private let environment: ORTEnv
    private let session: ORTSession

    /// `bundle` is the folder that holds manifest.json.
    init(bundle: URL) throws {
        setenv("ORT_DISABLE_TELEMETRY", "1", 1) // read at the start; else Microsoft is told of each process
        environment = try ORTEnv(loggingLevel: .warning)
        let file = bundle.appendingPathComponent("{{model}}").path
        session = try ORTSession(env: environment, modelPath: file, sessionOptions: ORTSessionOptions())
    }

    /// One output for one row of token ids; what the graph doesn't take is left out.
    func run(_ ids: [String: [Int]], output: String) throws -> [Float] {
        let feed = try ids.filter { Self.inputs.contains($0.key) }.mapValues { row -> ORTValue in
            let values = row.map(Int64.init)
            let data = values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
            return try ORTValue(tensorData: data, elementType: .int64, shape: [1, NSNumber(value: values.count)])
        }
        return try run(feed, output)
    }

    /// One output for one row of floats.
    func run(_ input: String, _ values: [Float], shape: [Int], output: String) throws -> [Float] {
        let data = values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
        let value = try ORTValue(tensorData: data, elementType: .float, shape: shape.map { NSNumber(value: $0) })
        return try run([input: value], output)
    }

    private func run(_ feed: [String: ORTValue], _ output: String) throws -> [Float] {
        let found = try session.run(withInputs: feed, outputNames: [output], runOptions: nil)
        let data = try found[output]!.tensorData() as Data
        return data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
    }
}
