// {{name}}: text -> embedding, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Swift packages: what Model.swift names and, for tokenizer.json, huggingface/swift-transformers.
import Foundation
import Tokenizers

final class Encoder {
    static let prefix = [{{prefix}}]
    static let suffix = [{{suffix}}]
    static let maxLength = {{max_length}}
    static let dimensions = {{dimensions}}
    static let normalize = {{normalize}}

    private let model: Model
    private let tokenizer: Tokenizer

    /// `bundle` is the folder that holds manifest.json.
    init(bundle: URL) async throws {
        model = try Model(bundle: bundle)
        let folder = bundle.appendingPathComponent("{{tokenizer}}").deletingLastPathComponent()
        tokenizer = try await AutoTokenizer.from(modelFolder: folder)
    }

    /// The ids of a text: special ones before and after as many of its own as there is room for.
    func encode(_ text: String) -> [Int] {
        let own = tokenizer.encode(text: text, addSpecialTokens: false)
        let room = Self.maxLength - Self.prefix.count - Self.suffix.count
        return Self.prefix + own.prefix(room) + Self.suffix
    }

    /// The embedding of a text, `dimensions` values.
    func embed(_ text: String) throws -> [Float] {
        let ids = encode(text)
        let given = ["input_ids": ids, "attention_mask": ids.map { _ in 1 }]
        let values = try model.run(given, output: "{{output}}") // of all tokens, one after the other
        let count = Self.dimensions
        let found: [Float] = {{pooled_swift}}
        let length = Self.normalize ? Self.norm(found) : 1
        return found.map { $0 / length }
    }

    /// Sentences with the cosine of their embeddings to the question's, the nearest first.
    func nearest(_ question: String, _ sentences: [String]) throws -> [(sentence: String, cosine: Float)] {
        let asked = try embed(question)
        let found = try sentences.map { (sentence: $0, cosine: Self.cosine(asked, try embed($0))) }
        return found.sorted { $0.cosine > $1.cosine }
    }

    static func cosine(_ one: [Float], _ other: [Float]) -> Float {
        zip(one, other).map(*).reduce(0, +) / (norm(one) * norm(other))
    }

    private static func norm(_ values: [Float]) -> Float { values.map { $0 * $0 }.reduce(0, +).squareRoot() }
}
