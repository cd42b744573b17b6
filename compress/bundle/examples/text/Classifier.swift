// {{name}}: text -> label, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Swift packages: microsoft/onnxruntime-swift-package-manager (the self-test passed with ONNX Runtime {{version}}) and, for
// tokenizer.json, huggingface/swift-transformers. Add the folder model/ to the app as a folder reference.
import Foundation
import OnnxRuntimeBindings
import Tokenizers

final class Classifier {
    static let labels = [{{labels_swift}}]
    static let prefix = [{{prefix}}]
    static let suffix = [{{suffix}}]
    static let maxLength = {{max_length}}

    private let environment: ORTEnv
    private let session: ORTSession
    private let tokenizer: Tokenizer

    /// `bundle` is the folder that holds manifest.json.
    init(bundle: URL) async throws {
        environment = try ORTEnv(loggingLevel: .warning)
        let model = bundle.appendingPathComponent("{{model}}").path
        session = try ORTSession(env: environment, modelPath: model, sessionOptions: ORTSessionOptions())
        let folder = bundle.appendingPathComponent("{{tokenizer}}").deletingLastPathComponent()
        tokenizer = try await AutoTokenizer.from(modelFolder: folder)
    }

    /// The ids of a text: special ones before and after as many of its own as there is room for.
    func encode(_ text: String) -> [Int] {
        let own = tokenizer.encode(text: text, addSpecialTokens: false)
        let room = Self.maxLength - Self.prefix.count - Self.suffix.count
        return Self.prefix + own.prefix(room) + Self.suffix
    }

    /// Labels with their probabilities, likeliest first.
    func classify(_ text: String) throws -> [(label: String, score: Double)] {
        let ids = encode(text)
        let given: [String: [Int64]] = [{{inputs_swift}}]
        let feed = try given.mapValues { values -> ORTValue in
            let data = values.withUnsafeBytes { NSMutableData(bytes: $0.baseAddress, length: $0.count) }
            return try ORTValue(tensorData: data, elementType: .int64, shape: [1, NSNumber(value: values.count)])
        }
        let found = try session.run(withInputs: feed, outputNames: ["{{output}}"], runOptions: nil)
        let data = try found["{{output}}"]!.tensorData() as Data
        let scores = data.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }.map(Double.init)
        let powers = scores.map { exp($0 - scores.max()!) }
        let sum = powers.reduce(0, +)
        return zip(Self.labels, powers.map { $0 / sum }).map { (label: $0, score: $1) }.sorted { $0.score > $1.score }
    }
}
