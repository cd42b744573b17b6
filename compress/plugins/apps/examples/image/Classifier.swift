{% set resize, crop = rule.resize or {}, rule.center_crop or {} %}
// {{ name }}: picture -> label, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Swift package: what Model.swift names.
import CoreGraphics
import Foundation

final class Classifier {
    static let channels = "{{ rule.channels }}"
    static let filter = "{{ resize.filter | default("", true) }}"
    static let (resizeWidth, resizeHeight, shortestEdge) = ({{ resize.width | default(0, true) }}, {{ resize.height | default(0, true) }}, {{ resize.shortest_edge | default(0, true) }}) // 0: not so
    static let (cropWidth, cropHeight) = ({{ crop.width | default(0, true) }}, {{ crop.height | default(0, true) }})
    static let factor = {{ rule.rescale_factor }}
    static let mean: [Double] = [{{ rule.mean | join(", ") }}]
    static let std: [Double] = [{{ rule.std | join(", ") }}]

    struct Image {
        var width: Int, height: Int, data: [Int]
    }

    private let model: Model
    private let labels: [String]

    /// `bundle` is the folder that holds manifest.json.
    init(bundle: URL) throws {
        model = try Model(bundle: bundle)
        let manifest = try JSONSerialization.jsonObject(with: Data(contentsOf: bundle.appendingPathComponent("manifest.json")))
        let end = (manifest as! [String: Any])["postprocessing"] as! [String: Any]
        labels = end["labels"] as! [String]
    }

    /// Labels with their probabilities, likeliest first, of an upright picture.
    func classify(_ picture: CGImage) throws -> [(label: String, score: Double)] {
        let (values, height, width) = prepare(picture)
        let shape = [1, Self.channels.count, height, width]
        let scores = try model.run("{{ rule.input }}", values, shape: shape, output: "{{ end.output }}").map(Double.init)
        let powers = scores.map { exp($0 - scores.max()!) }
        let sum = powers.reduce(0, +)
        return zip(labels, powers.map { $0 / sum }).map { (label: $0, score: $1) }.sorted { $0.score > $1.score }
    }

    /// Floats by channel, row and column, and the numbers of rows and columns.
    func prepare(_ picture: CGImage) -> ([Float], Int, Int) {
        let image = resized(Self.bytes(of: picture))
        let height = Self.cropHeight > 0 ? Self.cropHeight : image.height
        let width = Self.cropWidth > 0 ? Self.cropWidth : image.width
        let top = Int((Double(image.height - height) / 2).rounded(.down))
        let left = Int((Double(image.width - width) / 2).rounded(.down))
        let depth = Self.channels.count
        var values: [Float] = []
        values.reserveCapacity(depth * height * width)
        for channel in 0..<depth {
            for row in top..<(top + height) {
                for column in left..<(left + width) {
                    let inside = row >= 0 && row < image.height && column >= 0 && column < image.width
                    let level = inside ? image.data[(row * image.width + column) * depth + channel] : 0
                    values.append(Float((Double(level) * Self.factor - Self.mean[channel]) / Self.std[channel]))
                }
            }
        }
        return (values, height, width)
    }

    /// The channels that the model takes, on white where the picture is transparent.
    private static func bytes(of picture: CGImage) -> Image {
        let (width, height) = (picture.width, picture.height)
        var rgba = [UInt8](repeating: 0, count: width * height * 4)
        // In the picture's own colours, so that its bytes stay as they are.
        let space = picture.colorSpace.flatMap { $0.model == .rgb ? $0 : nil } ?? CGColorSpaceCreateDeviceRGB()
        rgba.withUnsafeMutableBytes { buffer in
            let context = CGContext(
                data: buffer.baseAddress, width: width, height: height, bitsPerComponent: 8, bytesPerRow: width * 4,
                space: space, bitmapInfo: CGImageAlphaInfo.premultipliedLast.rawValue)!
            context.setFillColor(red: 1, green: 1, blue: 1, alpha: 1)
            context.fill(CGRect(x: 0, y: 0, width: width, height: height))
            context.draw(picture, in: CGRect(x: 0, y: 0, width: width, height: height))
        }
        var data: [Int] = []
        data.reserveCapacity(width * height * channels.count)
        for pixel in stride(from: 0, to: rgba.count, by: 4) {
            let (r, g, b) = (Int(rgba[pixel]), Int(rgba[pixel + 1]), Int(rgba[pixel + 2]))
            switch channels {
            case "L": data.append((19595 * r + 38470 * g + 7471 * b + 32768) >> 16)
            case "BGR": data += [b, g, r]
            default: data += [r, g, b]
            }
        }
        return Image(width: width, height: height, data: data)
    }

    /// As Pillow does it; CoreGraphics interpolates otherwise, and the model would be shown another picture.
    private func resized(_ image: Image) -> Image {
        var (width, height) = (image.width, image.height)
        if Self.shortestEdge > 0 {
            let other = Self.shortestEdge * max(width, height) / min(width, height)
            (width, height) = width <= height ? (Self.shortestEdge, other) : (other, Self.shortestEdge)
        } else if Self.resizeHeight > 0 {
            (width, height) = (Self.resizeWidth, Self.resizeHeight)
        }
        var data = image.data
        let depth = Self.channels.count
        if width != image.width { data = along(data, image.height, image.width, width, depth) }
        if height != image.height { data = along(data, 1, image.height, height, width * depth) }
        return Image(width: width, height: height, data: data)
    }

    /// One axis of [outer, before, inner] -> [outer, after, inner], rounded to 8 bits; weights in units of 2^-22.
    private func along(_ data: [Int], _ outer: Int, _ before: Int, _ after: Int, _ inner: Int) -> [Int] {
        var found = [Int](repeating: 0, count: outer * after * inner)
        let reach = ["bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0][Self.filter] ?? 1.0
        let scale = Double(before) / Double(after)
        let wide = max(scale, 1)
        let support = reach * wide
        for place in 0..<after {
            let center = (Double(place) + 0.5) * scale
            let low = max(0, Int(center - support + 0.5))
            let high = min(before, Int(center + support + 0.5))
            let own = (low..<high).map { weight((Double($0) - center + 0.5) * (1 / wide)) }
            let sum = own.reduce(0, +)
            let units = own.map { ($0 / sum * 4_194_304).rounded(.toNearestOrAwayFromZero) }.map { Int($0) }
            for block in 0..<outer {
                for rest in 0..<inner {
                    var total = 1 << 21
                    for (k, unit) in units.enumerated() { total += data[(block * before + low + k) * inner + rest] * unit }
                    found[(block * after + place) * inner + rest] = min(255, max(0, total >> 22))
                }
            }
        }
        return found
    }

    private func weight(_ at: Double) -> Double {
        func sinc(_ x: Double) -> Double { x == 0 ? 1 : sin(x * .pi) / (x * .pi) }
        let x = abs(at)
        switch Self.filter {
        case "bilinear": return max(0, 1 - x)
        case "lanczos": return at >= -3 && at < 3 ? sinc(at) * sinc(at / 3) : 0
        default: return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0
        }
    }
}
