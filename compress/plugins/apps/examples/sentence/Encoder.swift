// {{ name }}: text -> embedding, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Swift packages: what Model.swift names and, for tokenizer.json, huggingface/swift-transformers.
import Foundation
import Tokenizers

final class Encoder {
    static let prefix = [{{ rule.prefix_ids | join(", ") }}]
    static let suffix = [{{ rule.suffix_ids | join(", ") }}]
    static let maxLength = {{ rule.max_length }}
    static let dimensions = {{ end.dimensions }}
    static let normalize = {{ end.normalize | lower }}

    private let model: Model
    private let tokenizer: Tokenizer

    /// `bundle` is the folder that holds manifest.json.
    init(bundle: URL) async throws {
        model = try Model(bundle: bundle)
        let folder = bundle.appendingPathComponent("{{ rule.tokenizer }}").deletingLastPathComponent()
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
        let values = try model.run(given, output: "{{ end.output }}") // of all tokens, one after the other
        let count = Self.dimensions
        let found: [Float] = {% if end.pooling == "mean" -%}
            (0..<count).map { at in stride(from: at, to: values.count, by: count).map { values[$0] }.reduce(0, +) * Float(count) / Float(values.count) }
        {%- elif end.pooling == "cls" -%}
            Array(values.prefix(count))
        {%- elif end.pooling == "max" -%}
            (0..<count).map { at in stride(from: at, to: values.count, by: count).map { values[$0] }.max()! }
        {%- elif end.pooling == "lasttoken" -%}
            Array(values.suffix(count))
        {%- else -%}
            values
        {%- endif +%}
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
