{% set resize, crop = rule.resize or {}, rule.center_crop or {} %}
// {{ name }}: picture -> label, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Gradle: what Model.kt names. Put manifest.json into src/main/assets too.
import android.content.Context
import android.graphics.Bitmap
import android.graphics.Color
import kotlin.math.PI
import kotlin.math.abs
import kotlin.math.exp
import kotlin.math.max
import kotlin.math.min
import kotlin.math.sin
import org.json.JSONObject

class Classifier(context: Context) : AutoCloseable {
    private val mean = doubleArrayOf({{ rule.mean | join(", ") }})
    private val std = doubleArrayOf({{ rule.std | join(", ") }})
    private val model = Model(context)
    private val labels = context.assets.open("manifest.json").use {
        val listed = JSONObject(it.reader().readText()).getJSONObject("postprocessing").getJSONArray("labels")
        List(listed.length(), listed::getString)
    }

    /** Label to probability, likeliest first, of an upright picture. */
    fun classify(bitmap: Bitmap): List<Pair<String, Double>> {
        val (values, height, width) = prepare(bitmap)
        val shape = longArrayOf(1, CHANNELS.length.toLong(), height.toLong(), width.toLong())
        val scores = model.run("{{ rule.input }}", values, shape, "{{ end.output }}")
        val powers = scores.map { exp((it - scores.max()).toDouble()) }
        return labels.zip(powers.map { it / powers.sum() }).sortedByDescending { it.second }
    }

    /** Floats by channel, row and column, and the numbers of rows and columns. */
    fun prepare(bitmap: Bitmap): Triple<FloatArray, Int, Int> {
        val image = resized(Image(bitmap.width, bitmap.height, channels(bitmap)))
        val height = if (CROP_HEIGHT > 0) CROP_HEIGHT else image.height
        val width = if (CROP_WIDTH > 0) CROP_WIDTH else image.width
        val top = Math.floorDiv(image.height - height, 2)
        val left = Math.floorDiv(image.width - width, 2)
        val depth = CHANNELS.length
        val values = FloatArray(depth * height * width)
        for (channel in 0 until depth) for (y in 0 until height) for (x in 0 until width) {
            val row = y + top
            val column = x + left
            val inside = row in 0 until image.height && column in 0 until image.width
            val level = if (inside) image.data[(row * image.width + column) * depth + channel] else 0
            values[(channel * height + y) * width + x] = ((level * FACTOR - mean[channel]) / std[channel]).toFloat()
        }
        return Triple(values, height, width)
    }

    /** Laid on white where it is transparent. */
    private fun channels(bitmap: Bitmap): IntArray {
        val pixels = IntArray(bitmap.width * bitmap.height)
        bitmap.getPixels(pixels, 0, bitmap.width, 0, 0, bitmap.width, bitmap.height)
        val depth = CHANNELS.length
        val found = IntArray(pixels.size * depth)
        pixels.forEachIndexed { place, pixel ->
            val alpha = Color.alpha(pixel)
            val (r, g, b) = listOf(Color.red(pixel), Color.green(pixel), Color.blue(pixel)).map {
                if (alpha == 255) it else (it * alpha + 255 * (255 - alpha) + 127) / 255
            }
            if (depth == 1) {
                found[place] = (19595 * r + 38470 * g + 7471 * b + 32768) shr 16
            } else {
                found[place * 3] = if (CHANNELS == "BGR") b else r
                found[place * 3 + 1] = g
                found[place * 3 + 2] = if (CHANNELS == "BGR") r else b
            }
        }
        return found
    }

    /** As Pillow does it: Bitmap.createScaledBitmap skips pixels, and the model would be shown another picture. */
    private fun resized(image: Image): Image {
        var (width, height) = image.width to image.height
        if (SHORTEST_EDGE > 0) {
            val other = (SHORTEST_EDGE.toLong() * max(width, height) / min(width, height)).toInt()
            val upright = width <= height
            width = if (upright) SHORTEST_EDGE else other
            height = if (upright) other else SHORTEST_EDGE
        } else if (RESIZE_HEIGHT > 0) {
            width = RESIZE_WIDTH
            height = RESIZE_HEIGHT
        }
        val depth = CHANNELS.length
        var data = image.data
        if (width != image.width) data = along(data, image.height, image.width, width, depth)
        if (height != image.height) data = along(data, 1, image.height, height, width * depth)
        return Image(width, height, data)
    }

    /** One axis of [outer, before, inner] -> [outer, after, inner], rounded to 8 bits; weights in units of 2^-22. */
    private fun along(data: IntArray, outer: Int, before: Int, after: Int, inner: Int): IntArray {
        val found = IntArray(outer * after * inner)
        val scale = before.toDouble() / after
        val wide = max(scale, 1.0)
        val support = REACH * wide
        for (place in 0 until after) {
            val center = (place + 0.5) * scale
            val low = max(0, (center - support + 0.5).toInt())
            val high = min(before, (center + support + 0.5).toInt())
            val own = DoubleArray(high - low) { weight((it + low - center + 0.5) * (1 / wide)) }
            val sum = own.sum()
            val units = IntArray(own.size) {
                val unit = own[it] / sum * (1 shl 22)
                (if (unit < 0) unit - 0.5 else unit + 0.5).toInt()
            }
            for (block in 0 until outer) for (rest in 0 until inner) {
                var total = 1 shl 21
                for (k in units.indices) total += data[(block * before + low + k) * inner + rest] * units[k]
                found[(block * after + place) * inner + rest] = (total shr 22).coerceIn(0, 255)
            }
        }
        return found
    }

    private fun weight(at: Double): Double = when (FILTER) {
        "bilinear" -> max(0.0, 1 - abs(at))
        "lanczos" -> if (at >= -3 && at < 3) sinc(at) * sinc(at / 3) else 0.0
        else -> abs(at).let {
            if (it < 1) (1.5 * it - 2.5) * it * it + 1 else if (it < 2) (((it - 5) * it + 8) * it - 4) * -0.5 else 0.0
        }
    }

    private fun sinc(x: Double): Double = if (x == 0.0) 1.0 else sin(x * PI) / (x * PI)

    override fun close() = model.close()

    private class Image(val width: Int, val height: Int, val data: IntArray)

    private companion object {
        const val CHANNELS = "{{ rule.channels }}"
        const val FILTER = "{{ resize.filter | default("", true) }}"
        val REACH = mapOf("bilinear" to 1.0, "bicubic" to 2.0, "lanczos" to 3.0)[FILTER] ?: 1.0
        const val RESIZE_WIDTH = {{ resize.width | default(0, true) }} // 0: not so
        const val RESIZE_HEIGHT = {{ resize.height | default(0, true) }}
        const val SHORTEST_EDGE = {{ resize.shortest_edge | default(0, true) }}
        const val CROP_WIDTH = {{ crop.width | default(0, true) }}
        const val CROP_HEIGHT = {{ crop.height | default(0, true) }}
        const val FACTOR = {{ rule.rescale_factor }}
    }
}
