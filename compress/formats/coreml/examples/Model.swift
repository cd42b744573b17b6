// The bundle's model through Core ML, written from manifest.json. Not compiled where it was written, and never run.
// iOS {{version}} or later. Add {{model}} to the app's target, where Xcode compiles it, and the bundle's folder as a
// folder reference.
import CoreML
import Foundation

final class Model {
    static let inputs = [{{inputs}}]

    private let model: MLModel

    /// `bundle` is the folder that holds manifest.json.
    init(bundle: URL) throws {
        model = try MLModel(contentsOf: Bundle.main.url(forResource: "model", withExtension: "mlmodelc")!)
    }

    /// One output for one row of token ids; what the model doesn't take is left out.
    func run(_ ids: [String: [Int]], output: String) throws -> [Float] {
        let feed = ids.filter { Self.inputs.contains($0.key) }.mapValues { row in
            MLFeatureValue(multiArray: MLMultiArray(MLShapedArray(scalars: row.map(Int32.init), shape: [1, row.count])))
        }
        return try run(feed, output)
    }

    /// One output for one row of floats.
    func run(_ input: String, _ values: [Float], shape: [Int], output: String) throws -> [Float] {
        try run([input: MLFeatureValue(multiArray: MLMultiArray(MLShapedArray(scalars: values, shape: shape)))], output)
    }

    private func run(_ feed: [String: MLFeatureValue], _ output: String) throws -> [Float] {
        let found = try model.prediction(from: MLDictionaryFeatureProvider(dictionary: feed))
        return MLShapedArray<Float>(converting: found.featureValue(for: output)!.multiArrayValue!).scalars
    }
}
