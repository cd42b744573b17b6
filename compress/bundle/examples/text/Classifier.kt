// {{name}}: text -> label, written from manifest.json. Not compiled where it was written; check it with selftest.json.
// Gradle: implementation("com.microsoft.onnxruntime:onnxruntime-android:{{version}}"), the version that the self-test passed
// with; and for tokenizer.json, both of one version, implementation("ai.djl.huggingface:tokenizers:0.33.0") and
// runtimeOnly("ai.djl.android:tokenizer-native:0.33.0"). Put the folder model/ into src/main/assets.
import ai.djl.huggingface.tokenizers.HuggingFaceTokenizer
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import android.content.Context
import java.nio.LongBuffer
import kotlin.math.exp

class Classifier(context: Context) : AutoCloseable {
    private val labels = listOf({{labels_kotlin}})
    private val prefix = longArrayOf({{prefix}})
    private val suffix = longArrayOf({{suffix}})
    private val maxLength = {{max_length}}
    private val environment = OrtEnvironment.getEnvironment()
    private val session = environment.createSession(context.assets.open("{{model}}").readBytes())
    private val tokenizer = context.assets.open("{{tokenizer}}").use { HuggingFaceTokenizer.newInstance(it, emptyMap()) }

    /** The ids of a text: special ones before and after as many of its own as there is room for. */
    fun encode(text: String): LongArray {
        val own = tokenizer.encode(text, false, false).ids
        return prefix + own.take(maxLength - prefix.size - suffix.size) + suffix
    }

    /** Label to probability, likeliest first. */
    fun classify(text: String): List<Pair<String, Double>> {
        val ids = encode(text)
        val shape = longArrayOf(1, ids.size.toLong())
        val given = mapOf({{inputs_kotlin}})
        val feed = given.mapValues { OnnxTensor.createTensor(environment, LongBuffer.wrap(it.value), shape) }
        try {
            session.run(feed, setOf("{{output}}")).use { result ->
                @Suppress("UNCHECKED_CAST")
                val scores = (result[0].value as Array<FloatArray>)[0]
                val powers = scores.map { exp((it - scores.max()).toDouble()) }
                return labels.zip(powers.map { it / powers.sum() }).sortedByDescending { it.second }
            }
        } finally {
            feed.values.forEach { it.close() }
        }
    }

    override fun close() {
        session.close()
        tokenizer.close()
    }
}
