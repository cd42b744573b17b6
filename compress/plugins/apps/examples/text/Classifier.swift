// {{ name }}: text -> label, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Swift packages: what Model.swift names and, for tokenizer.json, huggingface/swift-transformers.
import Foundation
import Tokenizers

final class Classifier {
    static let labels = [{{ end.labels | map("swift") | join(", ") }}]
    static let prefix = [{{ rule.prefix_ids | join(", ") }}]
    static let suffix = [{{ rule.suffix_ids | join(", ") }}]
    static let maxLength = {{ rule.max_length }}

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

    /// Labels with their probabilities, likeliest first.
    func classify(_ text: String) throws -> [(label: String, score: Double)] {
        let ids = encode(text)
        let given = ["input_ids": ids, "attention_mask": ids.map { _ in 1 }]
        let scores = try model.run(given, output: "{{ end.output }}").map(Double.init)
        let powers = scores.map { exp($0 - scores.max()!) }
        let sum = powers.reduce(0, +)
        return zip(Self.labels, powers.map { $0 / sum }).map { (label: $0, score: $1) }.sorted { $0.score > $1.score }
    }
}
